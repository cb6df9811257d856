"""Bytes and completion: memory, files, lanes. No policy lives here."""
