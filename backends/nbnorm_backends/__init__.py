"""The backends that come with nbnorm. Each is a plugin like any other, found through its entry point."""
