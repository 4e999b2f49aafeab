"""Licences of released weights."""

import re

UNKNOWN_LICENCE = "unknown: check the source"
# Beginning and end of the sha256 of released files, their licence.
_LICENCE_BY_HASH = (("75428afe", "4fb638", "MIT"), ("01bfe221", "0ed35845", "MIT"))
_ASL = "ASL (Academic Software License: no commercial use)"
_LICENCE_BY_NAME = (
    (r"mace[-_](omat|matpes|mh-[01]|omol|off2[34])", _ASL),
    (r"mace[-_](mpa-0|mp-0|mptrj|128-l[012])|ani500k", "MIT"),
)


def licence_of(name: str, digest: str) -> str:
    """Licence of released weights by their hash or, less surely, by the file's name."""
    for start, end, licence in _LICENCE_BY_HASH:
        if digest.startswith(start) and digest.endswith(end):
            return licence
    for pattern, licence in _LICENCE_BY_NAME:
        if re.search(pattern, name.lower()):
            return f"{licence} by its file name; check the source"
    return UNKNOWN_LICENCE
