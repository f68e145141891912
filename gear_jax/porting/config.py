"""Fields of somebody else's config.json, each checked for type and range when it is asked for."""

from typing import Any

from gear_jax.porting.files import CheckpointError, shorten

_NEEDED: Any = object()
_MOST = 1 << 24  # of any count; a width or a vocabulary stays well below


class Fields:
    """A section of a config; what is missing or makes no sense is an error that names it."""

    def __init__(self, values: Any, name: str):
        """Take the section called `name` in messages.

        Raises:
            CheckpointError: not an object.
        """
        if not isinstance(values, dict):
            raise CheckpointError(f"{name}: expected an object, found {type(values).__name__}")
        self.values, self.name = values, name

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, *keys: str, default: Any = _NEEDED) -> Any:
        """The first of several spellings that is there."""
        for key in keys:
            if key in self.values:
                return self.values[key]
        if default is _NEEDED:
            raise CheckpointError(f"{self.name}: field {keys[0]!r} is missing")
        return default

    def section(self, *keys: str, default: Any = _NEEDED) -> "Fields":
        """An object within this one."""
        return Fields(self.get(*keys, default=default), f"{self.name}: {keys[-1]}")

    def count(self, *keys: str, least: int = 1, most: int = _MOST, default: Any = _NEEDED) -> int:
        """A whole number."""
        value = self.get(*keys, default=default)
        if type(value) is not int or not least <= value <= most:
            self.refuse(keys[0], value, f"a whole number {least} .. {most}")
        return value

    def counts(self, *keys: str, least: int = 0, most: int = _MOST) -> tuple[int, ...]:
        """A list of whole numbers."""
        value = self.get(*keys)
        fine = isinstance(value, list) and all(type(x) is int and least <= x <= most for x in value)
        if not fine:
            self.refuse(keys[0], value, f"a list of whole numbers {least} .. {most}")
        return tuple(value)

    def positive(self, *keys: str, most: float = 1e12, default: Any = _NEEDED) -> float:
        """A number above 0."""
        value = self.get(*keys, default=default)
        if type(value) not in (int, float) or not 0 < value <= most:
            self.refuse(keys[0], value, f"a number above 0, at most {most:g}")
        return float(value)

    def flag(self, *keys: str, default: Any = _NEEDED) -> bool:
        """True or false."""
        value = self.get(*keys, default=default)
        if type(value) is not bool:
            self.refuse(keys[0], value, "true or false")
        return value

    def only(self, key: str, *accepted: Any, default: Any = _NEEDED) -> Any:
        """A field of which we build only some values."""
        value = self.get(key, default=default)
        if not any(type(value) is type(one) and value == one for one in accepted):
            self.refuse(key, value, " or ".join(repr(one) for one in accepted))
        return value

    def refuse(self, key: str, value: Any, expected: str) -> None:
        """Raise: the field holds something else than expected."""
        raise CheckpointError(f"{self.name}: {key} is {shorten(value)}, expected {expected}")
