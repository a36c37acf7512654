"""Ways into other libraries: each module imports the one that it is named after, and nothing here does before."""
