"""OpenMM hands on the text of an exception only; here its forces' own exceptions come back whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from openmm import OpenMMException

from mdplug.engines.openmm.plug import plugs_of


@contextmanager
def errors_of(*things: Any) -> Iterator[None]:
    """Let the original exception through instead of OpenMM's copy of its text.

    Args:
        things: the forces, systems, contexts or simulations whose mdplug forces may fail inside the block.

    Raises:
        BaseException: what was raised inside the force: SimulationError, the model's own, KeyboardInterrupt.
    """
    plugs = [plug for thing in things for plug in plugs_of(thing)]
    for plug in plugs:
        plug.error = None
    try:
        yield
    except (OpenMMException, SystemError) as error:
        for plug in plugs:
            original = plug.error
            if original is not None:
                plug.error = None
                raise original from error
        raise
