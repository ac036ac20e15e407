"""For the pages of reference: `Example:` in a docstring is code that runs, not a remark."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Give examples the heading under which Griffe looks for code."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = text
