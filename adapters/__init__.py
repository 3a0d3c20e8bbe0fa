"""What an engine speaks: pure protocol code, bytes in and out, no sockets."""
