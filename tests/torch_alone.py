"""A place where torch can be imported, and mdplug cannot."""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def with_torch_alone(folder: Path) -> Path:
    """A folder that holds torch and what torch itself requires, and nothing else."""
    folder.mkdir()
    wanted, seen = ["torch"], set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted.append(requirement.name)
        for top in {Path(str(f)).parts[0] for f in distribution.files or [] if ".." not in str(f)}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and top != "__pycache__" and not (folder / top).exists():
                (folder / top).symlink_to(source)
    return folder
