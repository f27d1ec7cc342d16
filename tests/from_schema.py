"""`hypothesis_jsonschema.from_schema`, made to work with the Hypothesis that is installed.

hypothesis-jsonschema 0.23 draws collections with `many.more()`, which newer versions of Hypothesis
have replaced by a context manager with an iterator. Where it is missing, it is put back here in
terms of those."""

from typing import Any

from hypothesis.internal.conjecture import utils
from hypothesis_jsonschema import from_schema

__all__ = ["from_schema"]


def _more(self: Any) -> bool:
    if not hasattr(self, "_elements"):
        self.__enter__()
        self._elements = iter(self)
    if next(self._elements, self) is self:
        self.__exit__(None)
        return False
    return True


if not hasattr(utils.many, "more"):
    utils.many.more = _more
