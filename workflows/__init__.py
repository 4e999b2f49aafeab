"""Tasks: ``run(config) -> result``, one file each, imported as ``mdplug.workflows``."""

if __name__ != "mdplug.workflows":
    raise ImportError(f"import this package as mdplug.workflows, not as {__name__}")
