"""The status page: what the line sees and says, in a browser."""
