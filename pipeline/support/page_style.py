"""The look of every page that is written: the report, the conversion page, the model card."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --ground:#f5f7fa; --card:#ffffff; --text:#1c2430; --muted:#667085; --line:#e4e8ee;
  --accent:#0b63a8; --good:#0a7a55; --bad:#b4430a; --bar:#d5e6f5; --code:#f1f4f8; }
@media (prefers-color-scheme: dark) { :root { --ground:#0f141b; --card:#171d27; --text:#e6eaf0; --muted:#98a2b3;
  --line:#2b3442; --accent:#6cb6f0; --good:#3cc9a0; --bad:#f08a4b; --bar:#22405c; --code:#1e2632; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--ground); color:var(--text); line-height:1.55;
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:1060px; margin:0 auto; padding:40px 20px 64px; }
h1 { font-size:2rem; line-height:1.2; margin:0 0 6px; letter-spacing:-.015em; }
h2 { font-size:1.2rem; margin:0 0 4px; letter-spacing:-.01em; }
p { margin:6px 0 12px; max-width:104ch; } .muted, figcaption, .note { color:var(--muted); }
.note, figcaption { font-size:.875rem; }
section { background:var(--card); border:1px solid var(--line); border-radius:12px; padding:22px 24px; margin:18px 0; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(190px,1fr)); gap:14px; margin:20px 0; }
.tile { background:var(--card); border:1px solid var(--line); border-radius:12px; padding:14px 18px; }
.tile b { display:block; font-size:1.55rem; font-variant-numeric:tabular-nums; letter-spacing:-.02em; line-height:1.3; }
.tile span { color:var(--muted); font-size:.85rem; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-size:.92rem; font-variant-numeric:tabular-nums; margin:10px 0 4px; }
th { text-align:right; font-weight:600; color:var(--muted); font-size:.8rem; vertical-align:bottom;
  border-bottom:1px solid var(--line); }
td { text-align:right; border-bottom:1px solid var(--line); } th,td { padding:8px 10px; } td { white-space:nowrap; }
th:first-child,td:first-child,th.left,td.left { text-align:left; } tr:last-child td { border-bottom:0; }
td.name { white-space:normal; min-width:9em; }
td small { color:var(--muted); display:block; font-size:.8rem; white-space:normal; }
tr.best td { font-weight:600; } tr.best td small { font-weight:400; } tr.reference td { color:var(--muted); }
td.bar { background-image:linear-gradient(var(--bar),var(--bar)); background-repeat:no-repeat;
  background-position:right center; }
.good { color:var(--good); } .bad { color:var(--bad); }
figure { margin:14px 0 0; } img { display:block; width:100%; height:auto; border-radius:8px; }
pre, code { font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; font-size:.84rem; }
pre { background:var(--code); border-radius:8px; padding:12px 14px; overflow-x:auto; margin:8px 0;
  white-space:pre-wrap; overflow-wrap:anywhere; }
code { background:var(--code); border-radius:4px; padding:1px 4px; } pre code { padding:0; }
.samples { display:grid; grid-template-columns:repeat(auto-fit,minmax(320px,1fr)); gap:14px; margin-top:10px; }
.samples h3 { font-size:.92rem; margin:0; } .samples pre { max-height:260px; overflow-y:auto; }
details { margin-top:10px; } summary { cursor:pointer; color:var(--accent); }
footer { color:var(--muted); font-size:.85rem; margin-top:24px; }
@media print { body { background:#fff; } section, .tile { break-inside:avoid; } }
"""
