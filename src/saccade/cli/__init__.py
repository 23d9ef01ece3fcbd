"""The command line: one file a verb, each of which calls one function of the library."""
