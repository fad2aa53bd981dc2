"""The style and the script that every HTML token map carries.

They are constants so that a page can allow exactly them, by hash, and nothing else.
"""

from __future__ import annotations

from quickmerge.report.palette import DARK, LIGHT, ON_SLOT, SLOT_COLORS, Theme, rgb, tint_alpha


def _variables(theme: Theme) -> str:
    return (
        f"--qi:{theme.ink};--qu:{theme.muted};--qf:{theme.faint};--ql:{theme.line};--qc:{theme.card};"
        f"--qk:{theme.chip};--qa:{theme.accent};--qs:{theme.soft};"
    )


_COLORS = "".join(
    f".qm-map .c{order}{{--c:{' '.join(map(str, rgb(color)))}}}" for order, color in enumerate(SLOT_COLORS)
)
_LEVELS = "".join(f".qm-map .w{level}{{--a:{tint_alpha(level):.3f}}}" for level in range(10))

TOKEN_MAP_CSS = (
    f".qm-map{{{_variables(LIGHT)}color-scheme:light dark}}"
    f"@media screen and (prefers-color-scheme:dark){{.qm-map{{{_variables(DARK)}}}}}"
    + _COLORS
    + _LEVELS
    + f"""
.qm-map{{margin:0;padding:1.25rem;background:var(--qc);color:var(--qi);border:1px solid var(--ql);
border-radius:14px;font:.9rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
print-color-adjust:exact;-webkit-print-color-adjust:exact}}
.qm-map figcaption strong{{font-size:1.05rem;margin-right:.75em}}
.qm-map .qm-sum{{color:var(--qa);font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}}
.qm-map p{{max-width:none}}
.qm-map figcaption p{{margin:.25rem 0 .75rem;color:var(--qu);max-width:70ch}}
.qm-map figcaption p:empty{{display:none}}
.qm-legend{{list-style:none;display:flex;flex-wrap:wrap;gap:.35rem 1.25rem;margin:0 0 .9rem;padding:0;
font-size:.82rem;color:var(--qu)}}
.qm-legend em{{font-style:normal;font-weight:600;color:var(--qi);font-variant-numeric:tabular-nums}}
.qm-legend .t{{padding:.1em .3em;margin-right:.2em}}
.qm-legend .qm-note{{flex-basis:100%;color:var(--qf)}}
.qm-strip{{display:block;width:100%;height:34px;background:var(--qk);border-radius:4px;overflow:hidden}}
.qm-strip .sk{{fill:var(--qa)}}.qm-strip .sm{{fill:var(--qa);fill-opacity:.36}}
.qm-map .qm-ends{{display:flex;justify-content:space-between;margin:.2rem 0 .9rem;font-size:.72rem;color:var(--qf)}}
.qm-text{{white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4;unicode-bidi:isolate;
font:.86rem/1.95 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace}}
.qm-map .t{{border-radius:3px;padding:.14em 0;box-decoration-break:clone;-webkit-box-decoration-break:clone;
font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono","Liberation Mono",monospace}}
.qm-map .k{{background:var(--qk);font-weight:600}}
.qm-map .a{{background:rgb(var(--c));color:{ON_SLOT};font-weight:600}}
.qm-map .m{{background:rgb(var(--c)/var(--a))}}
.qm-map .d{{color:var(--qf);text-decoration:line-through;text-decoration-thickness:1px}}
.qm-map .p{{border-bottom:2px solid var(--qi)}}
.qm-text .t+.t{{box-shadow:inset 1px 0 0 var(--qc)}}
.qm-text .t.on{{box-shadow:0 0 0 2px var(--qi);position:relative;z-index:1}}
.qm-text .m.on{{background:rgb(var(--c));color:{ON_SLOT}}}
.qm-text b::before{{content:"\\21b5";font-weight:400;color:var(--qf);opacity:.75}}
.qm-text .a b::before{{color:inherit}}
.qm-more summary{{cursor:pointer;margin:.8rem 0;color:var(--qa);font-weight:600}}
.qm-map .qm-read{{position:sticky;bottom:0;margin:.9rem -1.25rem -1.25rem;padding:.6rem 1.25rem;font-size:.8rem;
background:var(--qc);border-top:1px solid var(--ql);color:var(--qu);border-radius:0 0 14px 14px;z-index:2;
overflow-wrap:anywhere}}
@media print{{.qm-map .qm-read{{display:none}}}}
"""
)

# One listener for all maps of a page; the line it writes to shows only where it runs.
# It only ever moves text that is already there (textContent, never HTML).
TOKEN_MAP_JS = """
(()=>{
document.currentScript.parentNode.querySelector('.qm-read').hidden=false;
if(window.quickmergeMap)return;window.quickmergeMap=true;
let lit=[];
const point=event=>{
const token=event.target.closest?event.target.closest('.qm-text .t'):null;
for(const old of lit)old.classList.remove('on');
lit=[];
if(!token)return;
const map=token.closest('.qm-map');
map.querySelector('.qm-read').textContent=token.title;
lit=token.dataset.s===undefined?[token]:[...map.querySelectorAll('.t[data-s="'+Number(token.dataset.s)+'"]')];
for(const now of lit)now.classList.add('on')};
document.addEventListener('pointerover',point);
document.addEventListener('click',point)})();
"""
