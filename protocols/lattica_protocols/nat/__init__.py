"""Getting through NATs: finding out what they do, and opening them."""
