"""Networks and weight files. Everything here is torch; nothing of it is needed on a device."""
