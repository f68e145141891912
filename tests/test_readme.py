import collections
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_the_map_of_the_house_has_every_module_and_none_that_is_gone():
    """As many of a name as there are modules of that name: each room has its own policy.py."""
    text = (ROOT / "README.md").read_text().split("## The house")[1]
    named = [pathlib.Path(name).name for name in re.findall(r"[\w/]+\.py", text)]
    files = [path for top in ("gear_jax", "launch") for path in (ROOT / top).rglob("*.py")]
    there = [path.name for path in files if path.name != "__init__.py"]
    assert collections.Counter(named) == collections.Counter(there)
