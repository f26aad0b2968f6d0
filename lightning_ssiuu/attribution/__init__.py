"""Attribution methods, their variation under unlearning, and the diagnosis made of both."""
