"""For those who use a model: the text that it writes, and an export of it. Reads its artifact with torch."""
