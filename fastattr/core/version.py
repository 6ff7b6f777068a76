"""The version of the library, of which Hub artifacts and receipts keep a record."""

__version__ = "0.1.0"
