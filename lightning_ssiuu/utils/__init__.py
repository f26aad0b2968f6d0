"""The ground: errors, files, console, ranks and processes. Knows nothing of the package."""
