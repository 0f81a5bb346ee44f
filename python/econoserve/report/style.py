"""The look of the page, light or dark as the reader's system is."""

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --muted: #6e7781;
  --line: #d8dee4; --c0: #0072b2; --c1: #d55e00; --c2: #00845f; --c3: #b0508a; --c4: #b07d00;
  --c5: #3a8fc0; --c6: #6a51a3; --c7: #7a5230; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e4e8ec; --muted: #98a1aa;
  --line: #343a40; --c0: #58b0ec; --c1: #ff8c42; --c2: #3cc79b; --c3: #e58cc0; --c4: #e6bd4e;
  --c5: #9bd3f5; --c6: #b3a0e6; --c7: #cfa27c; } }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child { text-align: left; }
.wide { overflow-x: auto; }
figure { margin: 1.5rem 0; } figcaption, .source { color: var(--muted); font-size: 0.9rem; }
svg { max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; }
dl.settings { font-size: 0.9rem; } dt { color: var(--muted); } dd { margin: 0; }
"""
