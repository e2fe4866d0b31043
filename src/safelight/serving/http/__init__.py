"""What is of any HTTP server: connections, the forms of a request, of a body and of an answer. Imports no torch."""
