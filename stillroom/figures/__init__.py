"""Figures: arrays drawn by matplotlib, each with a sentence that says what it shows. No stage is known here."""
