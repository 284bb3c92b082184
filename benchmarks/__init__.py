"""Speed and error measured side by side."""
