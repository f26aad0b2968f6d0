"""A finished run's model on its way to others: what is known of it, its card, what leaves and where to."""
