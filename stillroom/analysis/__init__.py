"""Analysis: the numbers and arrays behind every figure; figures/ draws them."""
