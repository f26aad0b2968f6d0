"""The audit: what is measured, the verdict it leads to, and the page that shows both."""
