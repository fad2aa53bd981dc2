"""The style of a report page, as a constant that its own security policy allows by hash."""

from __future__ import annotations

from dataclasses import fields

from quickmerge.report.inline_svg import role_variables
from quickmerge.report.palette import DARK, LIGHT, SLOT_COLORS, Theme


def _variables(theme: Theme) -> str:
    colors = "".join(f"--{field.name}:{getattr(theme, field.name)};" for field in fields(theme))
    return colors + role_variables(theme is DARK)


PAGE_CSS = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:1rem/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:62rem;margin:0 auto;padding:clamp(1.25rem,4vw,3rem) clamp(1rem,4vw,2rem) 4rem}
header{margin-bottom:1.75rem}
.brand{display:flex;align-items:center;gap:.6rem;font-weight:650;font-size:.9rem;color:var(--muted);margin:0 0 1.5rem}
.brand svg{width:52px;height:14px;flex:none}
h1{font-size:clamp(1.6rem,4.6vw,2.35rem);line-height:1.15;letter-spacing:-.022em;font-weight:750;margin:0;
text-wrap:balance;overflow-wrap:anywhere}
header .sub{color:var(--muted);margin:.6rem 0 0;overflow-wrap:anywhere}
h2{font-size:1.3rem;line-height:1.25;letter-spacing:-.012em;margin:3rem 0 .6rem;overflow-wrap:anywhere}
h3{font-size:1.02rem;margin:1.75rem 0 .4rem;overflow-wrap:anywhere}
p{margin:.5rem 0 1rem;max-width:70ch;overflow-wrap:anywhere}
.lead{font-size:clamp(1.12rem,2.6vw,1.38rem);line-height:1.45;max-width:46em;margin:0 0 1.75rem;text-wrap:pretty}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(9.75rem,100%),1fr));gap:.85rem;margin:0 0 1rem;
padding:0;list-style:none}
.cards li{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:1rem 1.15rem}
.cards .label{display:block;color:var(--muted);font-size:.85rem;line-height:1.4}
.cards .value{display:block;font-size:1.8rem;font-weight:720;letter-spacing:-.025em;line-height:1.25;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.cards .note{color:var(--muted);font-size:.85rem;line-height:1.4;display:block}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:.85rem;margin:1rem 0}
.sides section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:1rem 1.25rem}
.sides section+section{border-color:var(--accent)}
.sides h3{margin:0 0 .5rem;font-size:.9rem;color:var(--muted);font-weight:600}
.sides section+section h3{color:var(--accent)}
.sides .said{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;unicode-bidi:isolate}
figure.shot{margin:1rem 0 1.5rem;background:var(--card);border:1px solid var(--line);border-radius:14px;
padding:1rem clamp(.75rem,2.5vw,1.25rem)}
.scroll{overflow-x:auto}
.qm-chart{display:block;width:100%;min-width:19rem;height:auto;max-width:54rem;margin:0}
figcaption.cap{color:var(--muted);font-size:.88rem;line-height:1.5;margin-top:.75rem;max-width:75ch}
.tablebox{overflow-x:auto;margin:1rem 0 1.5rem;background:var(--card);border:1px solid var(--line);border-radius:14px;
padding:.35rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{caption-side:bottom;text-align:left;color:var(--muted);font-size:.85rem;line-height:1.5;
padding:.7rem 1.15rem .55rem}
th,td{padding:.5rem .75rem;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{padding-left:1.15rem}th:last-child,td:last-child{padding-right:1.15rem}
thead th{color:var(--muted);font-weight:600;font-size:.82rem}
tbody tr:last-child>*{border-bottom:0}
tbody th{font-weight:500}
td.wrap,th.wrap{white-space:normal;overflow-wrap:anywhere;min-width:9rem}
.l{text-align:left}.r{text-align:right}.c{text-align:center}
table.dense{font-size:.83rem}table.dense th,table.dense td{padding-left:.5rem;padding-right:.5rem}
table.dense :is(th,td):first-child{padding-left:1.15rem}table.dense :is(th,td):last-child{padding-right:1.15rem}
tr.ruled:not(:first-child)>*{border-top:2px solid var(--faint)}
tr.strong>*{font-weight:650}tr.strong>:first-child{color:var(--accent)}
details.fold{margin:1rem 0;border-top:1px solid var(--line);padding-top:.75rem}
details.fold summary{cursor:pointer;font-weight:600;color:var(--accent)}
summary:focus-visible,.scroll:focus-visible,.tablebox:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
.qm-map{margin:1rem 0!important}
table:not(.dense) tbody th{white-space:normal;min-width:8.5rem}
:is(thead,tbody) tr>:first-child{position:sticky;left:0;background:var(--card)}
@media (max-width:40rem){
table,table.dense{font-size:.82rem}th,td{padding:.45rem .45rem}
.cards li{padding:.85rem .95rem}.cards .value{font-size:1.55rem}}
@media print{body{background:none;font-size:10.5pt}main{max-width:none;padding:0}
.cards li,.sides section,figure.shot,tr{break-inside:avoid}h2,h3{break-after:avoid}
.qm-chart{min-width:0}.scroll,.tablebox{overflow:visible}th,td{white-space:normal}}
"""
)


def mark() -> str:
    """Return the sign of the project: tokens going into two slots."""
    blue, orange = SLOT_COLORS[0], SLOT_COLORS[1]
    chips = ((0, 8, blue, 0.35), (9, 10, blue, 0.35), (20, 12, blue, 1), (33, 6, orange, 0.4), (40, 12, orange, 1))
    drawn = "".join(
        f'<rect x="{x}" y="0" width="{width}" height="14" rx="3" fill="{color}" fill-opacity="{alpha}"/>'
        for x, width, color, alpha in chips
    )
    return f'<svg viewBox="0 0 52 14" aria-hidden="true">{drawn}</svg>'
