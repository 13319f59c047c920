"""The line: triggered inspection with a deadline, from the camera to the reject signal."""
