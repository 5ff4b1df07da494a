"""Figures as inline SVG: static, and coloured by the page that they are in."""
