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
