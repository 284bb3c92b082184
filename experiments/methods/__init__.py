"""How a method is written on the command line, and the options that configs share."""
