"""The reference pages of the documentation, written from the code whenever the site is built; see `hooks`."""
