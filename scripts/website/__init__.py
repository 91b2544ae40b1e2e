"""The site without Quarto, in the order in which its parts work: notebooks, pages, search, checks, browser."""
