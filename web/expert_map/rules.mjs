// The text of an Expert Mask node: rules "BLOCKS: EXPERT=WEIGHT, …", one per line. Later rules win; # begins a comment.

const NAME = /^([^:]*):(.*)$/;

/** Parse the lines: {glob, entries: [[expert or "*", weight]…], comment} for a rule, {text} for any other line. */
function parse(text) {
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
      return { text: line }; // an invalid rule, which the node reports: keep it as it is
    }
    return { glob: match[1].trim(), entries, comment };
  });
}

/** The text of parsed lines, without rules that became empty. */
function format(parsed) {
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

/** Return whether a name matches a pattern, as Python's fnmatchcase does. */
export function fits(glob, name) {
  const pattern = glob.replace(/\[[^\]]+\]|[\s\S]/g, (part) => {
    if (part.length > 1) return part.replace(/^\[!/, "[^").replace(/\\/g, "\\\\");
    if (part === "*") return "[\\s\\S]*";
    if (part === "?") return "[\\s\\S]";
    return part.replace(/[.+^${}()|[\]\\/-]/g, "\\$&");
  });
  return new RegExp(`^${pattern}$`).test(name);
}

/** The weight of every expert of the layer `name` under the rules. */
export function weights(text, name, experts) {
  const result = new Array(experts).fill(1);
  for (const line of parse(text)) {
    if (line.glob === undefined || !fits(line.glob, name)) continue;
    for (const [expert, weight] of line.entries) {
      if (expert === "*") result.fill(weight);
      else if (expert < experts) result[expert] = weight;
    }
  }
  return result;
}

/** The text with `entries` added to the rule for `glob`, so that no later rule overrides them. */
function withRule(parsed, glob, entries) {
  const last = parsed.findLast((line) => line.glob !== undefined);
  if (last?.glob === glob) last.entries.push(...entries);
  else parsed.push({ glob, entries: [...entries], comment: "" });
  return format(parsed);
}

/** The text with a rule that gives `expert` the weight in the layers of `glob`. */
export function weigh(text, glob, expert, weight) {
  const parsed = parse(text);
  for (const line of parsed) {
    if (line.glob === glob) line.entries = line.entries.filter(([other]) => other !== expert);
  }
  return withRule(parsed, glob, [[expert, weight]]);
}

/** The text with a rule by which only `expert` paints in the layers of `glob`. */
export function isolate(text, glob, expert) {
  const parsed = parse(text);
  for (const line of parsed) if (line.glob === glob) line.entries = [];
  return withRule(parsed, glob, [["*", 0], [expert, 1]]);
}

/** The text without rules for `expert` in any of the layers `names`. A rule with entries for all experts (*) goes whole. */
export function clear(text, names, expert) {
  const parsed = parse(text);
  for (const line of parsed) {
    if (line.glob === undefined || !names.some((name) => fits(line.glob, name))) continue;
    const all = line.entries.some(([other]) => other === "*");
    line.entries = all ? [] : line.entries.filter(([other]) => other !== expert);
  }
  return format(parsed);
}
