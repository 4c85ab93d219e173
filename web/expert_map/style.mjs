// The map's style sheet. ComfyUI's variables define the theme; the fallback values are for pages without ComfyUI.

export const STYLE = `
.d2m-map {
  --d2m-ground: var(--comfy-menu-bg, #1f1f22);
  --d2m-field: var(--comfy-input-bg, #2a2a2e);
  --d2m-text: var(--input-text, #e4e4e4);
  --d2m-quiet: color-mix(in srgb, var(--d2m-text) 78%, var(--d2m-ground));
  --d2m-line: var(--border-color, #4e4e4e);
  --d2m-accent: #0b63b8;
  --d2m-on-accent: #fff;
  --d2m-empty: #d9dade;
  container: d2m-map / inline-size;
  position: relative; box-sizing: border-box; display: flex; flex-direction: column;
  width: 100%; height: 100%; min-height: 0; overflow: hidden; border-radius: 8px;
  background: var(--d2m-ground); color: var(--d2m-text);
  font: 12px/1.35 system-ui, "Noto Sans CJK SC", sans-serif; text-align: left; cursor: default; user-select: none;
}
.d2m-map[data-dark] { --d2m-accent: #6cb6ff; --d2m-on-accent: #06192c; --d2m-empty: #2b2d31; }
.d2m-map *, .d2m-map *::before { box-sizing: border-box; }
.d2m-map [hidden] { display: none !important; }
.d2m-map .d2m-body { flex: 1; min-height: 0; display: flex; flex-direction: column; gap: 8px; padding: 10px; overflow-y: auto; }
.d2m-map .d2m-message { flex: 1; display: grid; place-content: center; justify-items: center; padding: 24px;
  max-width: 46em; margin: auto; font-size: 13px; line-height: 1.6; text-align: center; white-space: pre-line; }
.d2m-map .d2m-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.d2m-map .d2m-quiet { color: var(--d2m-quiet); font-weight: 400; }
.d2m-map .d2m-said { min-height: 16px; font-size: 11px; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }

.d2m-map button, .d2m-map select {
  min-height: 24px; margin: 0; padding: 2px 8px; border: 1px solid var(--d2m-line); border-radius: 5px;
  background: var(--d2m-field); color: var(--d2m-text); font: inherit; cursor: pointer; }
.d2m-map button:hover:not([disabled]) { border-color: var(--d2m-accent); }
.d2m-map button[disabled] { cursor: default; border-style: dashed; color: var(--d2m-quiet); background: none; }
.d2m-map button[aria-pressed="true"], .d2m-map button[aria-checked="true"] {
  background: var(--d2m-accent); border-color: var(--d2m-accent); color: var(--d2m-on-accent); }
.d2m-map input[type="range"] { min-width: 0; width: 100%; height: 18px; margin: 0; accent-color: var(--d2m-accent); cursor: pointer; }
.d2m-map :focus { outline: none; }
.d2m-map :focus-visible { outline: 2px solid var(--d2m-accent); outline-offset: 2px; border-radius: 4px; }
.d2m-map .d2m-choice { display: inline-flex; }
.d2m-map .d2m-choice button { border-radius: 0; margin-left: -1px; }
.d2m-map .d2m-choice button:first-child { border-radius: 5px 0 0 5px; margin-left: 0; }
.d2m-map .d2m-choice button:last-child { border-radius: 0 5px 5px 0; }

.d2m-map .d2m-bar { display: flex; flex-wrap: wrap; align-items: center; gap: 6px; }
.d2m-map .d2m-bar input[type="range"] { width: 84px; }
.d2m-map .d2m-space { flex: 1; }

.d2m-map .d2m-main { flex: 3 0 250px; min-height: 250px; display: flex; gap: 12px; }
.d2m-map .d2m-stages { flex: 1 0 160px; min-width: 0; min-height: 160px; display: flex; gap: 8px; }
.d2m-map .d2m-pane { position: relative; flex: 1; min-width: 0; display: flex; flex-direction: column; gap: 4px; }
.d2m-map .d2m-pane-title { font-weight: 600; text-align: center; }
.d2m-map .d2m-note { position: absolute; left: 50%; bottom: 8px; transform: translateX(-50%); padding: 3px 10px;
  border-radius: 12px; background: rgb(0 0 0 / .78); color: #fff; text-align: center; pointer-events: none; }
.d2m-map .d2m-cells { position: relative; min-height: 0; cursor: crosshair; touch-action: none; }
.d2m-map .d2m-cells canvas { position: absolute; inset: 0; width: 100%; height: 100%; display: block; }
.d2m-map .d2m-cell { position: absolute; overflow: hidden; color: transparent; font-size: 1px; pointer-events: none; }
.d2m-map .d2m-cells:focus-visible .d2m-cell { outline: 2px solid #fff; box-shadow: 0 0 0 4px #000, 0 0 0 6px var(--d2m-accent); overflow: visible; }
.d2m-map .d2m-stage { flex: 1; }

.d2m-map .d2m-legend { flex: 0 0 190px; min-height: 0; display: flex; flex-direction: column; gap: 6px; }
.d2m-map .d2m-heading { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 10px; min-height: 17px; font-weight: 600; }
.d2m-map .d2m-legend > .d2m-heading { flex: none; }
.d2m-map .d2m-experts { flex: 0 1 auto; min-height: 40px; overflow-y: auto; display: flex; flex-direction: column; padding: 2px; }
.d2m-map .d2m-expert { display: grid; grid-template-columns: 28px 1fr auto 46px; align-items: center; gap: 6px;
  padding: 0 4px; border-radius: 5px; cursor: pointer; border: 1px solid transparent; }
.d2m-map .d2m-expert:hover { background: var(--d2m-field); }
.d2m-map .d2m-expert[aria-selected="true"] { border-color: var(--d2m-accent); background: var(--d2m-field); }
.d2m-map .d2m-expert:focus-visible { outline-offset: -1px; }
.d2m-map .d2m-chip { display: inline-block; min-width: 24px; padding: 1px 4px; border-radius: 4px; font-weight: 700; text-align: center; }
.d2m-map .d2m-track { height: 8px; border-radius: 4px; background: var(--d2m-empty); overflow: hidden; }
.d2m-map .d2m-track i { display: block; height: 100%; }
.d2m-map .d2m-share { text-align: right; font-variant-numeric: tabular-nums; }
.d2m-map .d2m-weight { font-weight: 700; }
.d2m-map .d2m-rules { display: flex; flex-direction: column; gap: 5px; padding-top: 6px; border-top: 1px solid var(--d2m-line); }
.d2m-map .d2m-actions { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }

.d2m-map .d2m-scrub { display: flex; flex-direction: column; gap: 6px; }
.d2m-map .d2m-scrub > div { display: flex; align-items: center; gap: 4px 8px; }
.d2m-map .d2m-scrub > div > :first-child { flex: 0 0 34px; }
.d2m-map .d2m-scrub input { flex: 1 1 80px; }
.d2m-map .d2m-scrub .d2m-value { flex: 0 0 174px; }
.d2m-map .d2m-scrub > div > :last-child { flex: 0 0 auto; justify-content: flex-end; }
.d2m-map .d2m-scrub .d2m-play { padding: 0; width: 34px; }
.d2m-map .d2m-label { flex: 0 0 34px; font-weight: 600; }
.d2m-map .d2m-value { font-variant-numeric: tabular-nums; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }

.d2m-map .d2m-path-part { display: flex; flex-direction: column; gap: 3px; }
.d2m-map .d2m-path { height: 44px; }
.d2m-map .d2m-path-part .d2m-heading { height: 22px; flex-wrap: nowrap; align-items: center; white-space: nowrap; overflow: hidden; }
.d2m-map .d2m-path-chosen { display: flex; gap: 8px; align-items: center; min-width: 0; overflow: hidden; font-weight: 400; }
.d2m-map .d2m-path-title { min-width: 0; overflow: hidden; text-overflow: ellipsis; }
.d2m-map .d2m-gate { display: inline-flex; gap: 4px; align-items: center; }
.d2m-map .d2m-axis { display: grid; gap: 2px; padding: 0 2px; font-size: 10px; color: var(--d2m-quiet); text-align: center; }
.d2m-map .d2m-axis span { border-top: 1px solid var(--d2m-line); }

.d2m-map .d2m-tabbed { flex: 1 1 180px; min-height: 150px; max-height: 320px; display: flex; flex-direction: column; gap: 6px; }
.d2m-map .d2m-tabs { display: flex; gap: 2px; border-bottom: 1px solid var(--d2m-line); }
.d2m-map .d2m-tabs button { border: 0; border-radius: 5px 5px 0 0; background: none; border-bottom: 2px solid transparent; }
.d2m-map .d2m-tabs button[aria-selected="true"] { border-bottom-color: var(--d2m-accent); font-weight: 600; }
.d2m-map .d2m-tab { flex: 1 1 auto; min-height: 0; }
.d2m-map .d2m-charts { height: 100%; display: flex; flex-direction: column; gap: 6px; overflow-y: auto; }
.d2m-map .d2m-chart { flex: 1; min-height: 0; display: flex; flex-direction: column; gap: 2px; }
.d2m-map .d2m-chart:has(.d2m-blocks) { flex: 1 0 auto; }
.d2m-map .d2m-chart .d2m-cells { flex: 1; min-height: 24px; }
.d2m-map .d2m-scale { display: flex; gap: 6px; align-items: center; justify-content: flex-end; font-size: 11px; }
.d2m-map .d2m-scale i { width: 110px; height: 8px; border-radius: 4px; }
.d2m-map .d2m-text { height: 100%; display: flex; flex-direction: column; gap: 4px; }
.d2m-map .d2m-tokens { flex: 0 1 auto; overflow-y: auto; display: flex; flex-wrap: wrap; gap: 3px; align-content: flex-start; padding: 3px; }
.d2m-map .d2m-token { display: inline-flex; flex-direction: column; align-items: stretch; min-width: 26px; border-radius: 4px;
  overflow: hidden; background: var(--d2m-field); text-align: center; cursor: pointer; }
.d2m-map .d2m-token span { padding: 1px 5px; }
.d2m-map .d2m-token b { padding: 0 4px; font-size: 11px; }
.d2m-map .d2m-word { margin-left: 4px; }
.d2m-map .d2m-token[aria-selected="true"] { box-shadow: 0 0 0 2px var(--d2m-accent); }
.d2m-map .d2m-faded b { background: var(--d2m-empty) !important; color: var(--d2m-text) !important; }

@container d2m-map (max-width: 520px) {
  .d2m-main { flex-direction: column; }
  .d2m-map .d2m-legend { flex: 0 0 auto; }
  .d2m-map .d2m-experts { display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); max-height: 110px; }
  .d2m-map .d2m-expert { grid-template-columns: auto auto 1fr; }
  .d2m-map .d2m-track { display: none; }
  .d2m-map .d2m-scrub > div { flex-wrap: wrap; }
  .d2m-map .d2m-path-part .d2m-heading { height: 44px; flex-wrap: wrap; align-content: center; }
  .d2m-map .d2m-path-title, .d2m-map .d2m-path-chosen { flex: 0 0 100%; }
  .d2m-map .d2m-scrub .d2m-value { flex: 1 0 100%; }
}
/* A wide node has the charts beside the map. */
@container d2m-map (min-width: 820px) {
  .d2m-map .d2m-body { display: grid; grid-template: auto minmax(250px, 1fr) auto auto auto auto / minmax(0, 3fr) minmax(0, 2fr); gap: 8px 16px; }
  .d2m-map .d2m-bar, .d2m-map .d2m-body > .d2m-quiet { grid-column: 1 / -1; }
  .d2m-map .d2m-main, .d2m-map .d2m-scrub, .d2m-map .d2m-path-part { grid-column: 1; }
  .d2m-map .d2m-tabbed { grid-column: 2; grid-row: 2 / 5; max-height: none; }
}
/* Two maps want the width. */
.d2m-map[data-compare="side"] .d2m-main { flex-direction: column; }
.d2m-map[data-compare="side"] .d2m-legend { flex: 0 0 auto; }
.d2m-map[data-compare="side"] .d2m-experts { display: grid; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); max-height: 84px; }
.d2m-map[data-compare="side"] .d2m-expert { grid-template-columns: auto auto 1fr; }
.d2m-map[data-compare="side"] .d2m-track { display: none; }
.d2m-map[data-compare="side"] .d2m-rules { flex-direction: row; flex-wrap: wrap; align-items: center; }
.d2m-map[data-compare="side"] .d2m-actions { grid-template-columns: repeat(4, auto); }
`;
