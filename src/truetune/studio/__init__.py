"""The local web page: it starts commands as processes of their own, reads run folders, and never imports torch."""
