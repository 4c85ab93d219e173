// Rules of an Expert mask node, as text: "BLOCKS: EXPERT=WEIGHT, …" a line, later ones win, # begins a comment.

const NAME = /^([^:]*):(.*)$/;

/** Lines of the text: {text} for what is no rule, {glob, entries: [[expert or "*", weight]…], comment} for a rule. */
function lines(text) {
  return text.split("\n").map((line) => {
    const [body, ...rest] = line.split("#");
    const comment = rest.length ? `#${rest.join("#")}` : "";
    const match = NAME.exec(body);
    if (!match) return { text: line };
    const entries = match[2].split(",").filter((entry) => entry.trim()).map((entry) => {
      const [expert, weight] = entry.split("=").map((part) => part.trim());
      return [expert === "*" ? "*" : Number(expert), Number(weight)];
    });
    if (entries.some(([expert, weight]) => (expert !== "*" && !Number.isInteger(expert)) || !(weight >= 0))) {
      return { text: line }; // wrong: the node says so; not ours to drop
    }
    return { glob: match[1].trim(), entries, comment };
  });
}

function written(parsed) {
  return parsed
    .filter((line) => line.text !== undefined || line.entries.length || line.comment)
    .map((line) => {
      if (line.text !== undefined) return line.text;
      if (!line.entries.length) return line.comment;
      const entries = line.entries.map(([expert, weight]) => `${expert}=${weight}`).join(", ");
      return `${line.glob}: ${entries}${line.comment ? ` ${line.comment}` : ""}`;
    })
    .join("\n")
    .replace(/^\n+|\n+$/g, "");
}

/** Does the glob (as Python's fnmatchcase reads it) fit the name? */
export function fits(glob, name) {
  const pattern = glob.replace(/\[[^\]]+\]|[\s\S]/g, (part) => {
    if (part.length > 1) return part.replace(/^\[!/, "[^").replace(/\\/g, "\\\\");
    if (part === "*") return "[\\s\\S]*";
    if (part === "?") return "[\\s\\S]";
    return part.replace(/[.+^${}()|[\]\\/-]/g, "\\$&");
  });
  return new RegExp(`^${pattern}$`).test(name);
}

/** Weight of every expert of the layer `name` under the rules. */
export function weights(text, name, experts) {
  const found = new Array(experts).fill(1);
  for (const line of lines(text)) {
    if (line.glob === undefined || !fits(line.glob, name)) continue;
    for (const [expert, weight] of line.entries) {
      if (expert === "*") found.fill(weight);
      else if (expert < experts) found[expert] = weight;
    }
  }
  return found;
}

/** The text with `entries` as the last word on the layers of `glob`. */
function withRule(parsed, glob, entries) {
  const last = parsed.findLast((line) => line.glob !== undefined);
  if (last?.glob === glob) last.entries.push(...entries);
  else parsed.push({ glob, entries: [...entries], comment: "" });
  return written(parsed);
}

/** The text in which `expert` has `weight` in the layers of `glob`. */
export function weigh(text, glob, expert, weight) {
  const parsed = lines(text);
  for (const line of parsed) {
    if (line.glob === glob) line.entries = line.entries.filter(([other]) => other !== expert);
  }
  return withRule(parsed, glob, [[expert, weight]]);
}

/** The text in which only `expert` paints in the layers of `glob`. */
export function isolate(text, glob, expert) {
  const parsed = lines(text);
  for (const line of parsed) if (line.glob === glob) line.entries = [];
  return withRule(parsed, glob, [["*", 0], [expert, 1]]);
}

/** The text without the rules that touch `expert` in any of the layers `names`; a rule for all experts (*) goes whole. */
export function clear(text, names, expert) {
  const parsed = lines(text);
  for (const line of parsed) {
    if (line.glob === undefined || !names.some((name) => fits(line.glob, name))) continue;
    const all = line.entries.some(([other]) => other === "*");
    line.entries = all ? [] : line.entries.filter(([other]) => other !== expert);
  }
  return written(parsed);
}
