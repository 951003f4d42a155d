"""One module a case; `registry.cases` lists them."""
