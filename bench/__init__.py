"""Measurements of Truetune beside its peers; see README.md. No part of the package."""
