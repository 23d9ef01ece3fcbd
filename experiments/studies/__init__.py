"""The papers' studies on the digit scenes: runs, tables, pictures and pages."""
