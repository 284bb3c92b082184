"""Tables, plots and terminal output."""
