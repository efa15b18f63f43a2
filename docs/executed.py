"""The directive `executed`: Python that runs when the site is built, shown with what it printed.

    ```{executed}
    real = stillroom.load_real("digits")
    print(real.classes)
    ```

The blocks of a page are one program: what one defines the next ones have. They run in `_executed/<page>` beside the
pages, so that a page can show a picture that its code wrote there. Code that fails fails the build, with its traceback.
"""

from __future__ import annotations

import contextlib
import io
import os
import traceback
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

FOLDER = "_executed"


class Executed(SphinxDirective):
    """One block of a page's program."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        code = "\n".join(self.content)
        page = self.env.docname
        names: dict[str, Any] = self.env.temp_data.setdefault(
            "executed", {"__name__": "__main__"}
        )  # forgotten after it
        folder = Path(self.env.srcdir) / FOLDER / page
        folder.mkdir(parents=True, exist_ok=True)
        printed = run_code(code, names, folder, f"{page}, line {self.lineno}")
        shown: list[nodes.Node] = [nodes.literal_block(code, code, language="python")]
        if printed:
            shown.append(nodes.literal_block(printed, printed, language="none", classes=["printed"]))
        return shown


def run_code(code: str, names: dict[str, Any], folder: Path, where: str) -> str:
    """Run `code` with `names` in `folder` and return what it printed.

    Raises ExtensionError, with the traceback, where it fails. What goes to standard error (progress) is not shown.
    """
    printed, before = io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(code, where, "exec"), names)
    except Exception as error:
        raise ExtensionError(f"{where}: the code failed.\n{traceback.format_exc()}") from error
    finally:
        os.chdir(before)
    return printed.getvalue().rstrip()


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("executed", Executed)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
