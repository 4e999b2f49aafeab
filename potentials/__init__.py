"""mdplug.potentials; see README."""

if __name__ != "mdplug.potentials":
    raise ImportError(
        "import it as mdplug.potentials: a second copy under another name would be a second set of classes"
    )
