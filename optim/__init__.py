"""Run the user's own optimizer over state that is elsewhere."""
