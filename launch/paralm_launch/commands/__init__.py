"""The commands of ``paralm``; each file adds its own to the application."""
