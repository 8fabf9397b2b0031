"""Evaluation: one file a question, each giving a typed result; written, drawn and reported in one place."""
