"""The chat page behind web_demo.py: replies of the engine for each browser, and the page that shows them."""
