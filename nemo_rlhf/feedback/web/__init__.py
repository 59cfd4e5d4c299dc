"""The web page on which people compare answers, and the view of whoever runs it."""
