"""What a call asks for: the list of its arguments, their validation, and the problem that a kernel is chosen for."""
