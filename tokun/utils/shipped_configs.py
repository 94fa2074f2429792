"""The configs that come with tokun: the repository's `configs/`, which a wheel holds as tokun/configs. Knows no setting."""

from __future__ import annotations

from pathlib import Path, PurePath

PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """The folder of the configs: the package's own, or the one beside it in a clone."""
    own, beside = PACKAGE / "configs", PACKAGE.parent / "configs"
    return beside if not own.is_dir() and (PACKAGE.parent / "pyproject.toml").is_file() else own


def find(path: str | Path, suffix: str = ".yaml") -> Path:
    """The file at `path`; if there is none, the config of that name which comes with tokun: engraving, ladder/350m, configs/tiny.yaml.

    Returns `path` itself if that does not exist either: the caller says so.
    """
    given = Path(path)
    if given.is_file() or given.is_absolute():
        return given
    parts = PurePath(given).parts
    name = PurePath(*parts[1:]) if len(parts) > 1 and parts[0] == "configs" else PurePath(given)
    found = folder() / (name if name.suffix == suffix else f"{name}{suffix}")
    return found if ".." not in parts and found.is_file() else given


def names(suffix: str = ".yaml") -> list[str]:
    """The names that `find` knows, such as "tiny" and "ladder/350m"."""
    return sorted(path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob(f"*{suffix}"))
