// Checks dashboards/millpond.json against Grafana's own types: the dashboard, and the options of each kind of panel.
//
//     npm ci && node check.mjs DASHBOARD        in a folder with this file, package.json and package-lock.json
//
// A name that the types do not know is an error, and so is a value of another kind. Queries are left to others: what a data
// source takes is in no type here, and a real Prometheus answers each of them in ../live.py.

import { readFileSync } from "node:fs";
import Ajv from "ajv";
import { createGenerator } from "ts-json-schema-generator";

const TYPES = "node_modules/@grafana/schema/dist/types/raw";
// The kinds of panel in use, and where their types are.
const KINDS = {
  gauge: "gauge",
  heatmap: "heatmap",
  stat: "stat",
  "state-timeline": "statetimeline",
  timeseries: "timeseries",
};
// What Grafana's Prometheus data source keeps with an annotation. The type of an annotation has only what all data sources
// share, and in the code that reads it these are beside it. They are allowed here, and nowhere else.
const OF_PROMETHEUS = {
  expr: { type: "string" },
  textFormat: { type: "string" },
  titleFormat: { type: "string" },
  tagKeys: { type: "string" },
  useValueForTime: { type: "boolean" },
};

const ajv = new Ajv({ allErrors: true, strict: false });

function schemaOf(path, type) {
  const options = { path: `${TYPES}/${path}/x/types.gen.d.ts`, type, skipTypeCheck: true, additionalProperties: false };
  return createGenerator(options).createSchema(type);
}

// Grafana fills in what the options of a panel leave out, although the types call some of it required.
function allOptional(schema) {
  return JSON.parse(JSON.stringify(schema, (key, value) => (key === "required" && Array.isArray(value) ? undefined : value)));
}

let passed = 0;
let failed = 0;

function check(what, schema, value) {
  const valid = ajv.validate(schema, value);
  if (valid) passed++;
  else failed++;
  for (const { instancePath, message, params } of valid ? [] : ajv.errors) {
    const detail = params.additionalProperty ?? params.allowedValues ?? "";
    console.error(`${what}${instancePath}: ${message} ${detail}`);
  }
}

const dashboard = JSON.parse(readFileSync(process.argv[2], "utf8"));
const whole = schemaOf("dashboard", "Dashboard");
Object.assign(whole.definitions.AnnotationQuery.properties, OF_PROMETHEUS);
// Panels are checked one by one, so that an error names the panel and not the place of one in a choice of two types.
whole.definitions.Dashboard.properties.panels = { type: "array" };
check("dashboard", whole, dashboard);
const panels = dashboard.panels.flatMap((panel) => [panel, ...(panel.panels ?? [])]);
for (const panel of panels) {
  const type = panel.type === "row" ? "RowPanel" : "Panel";
  check(`panel \`${panel.title}\`: `, { ...whole, $ref: `#/definitions/${type}` }, panel);
}

const kinds = Object.entries(KINDS).map(([kind, folder]) => {
  const path = `composable/${folder}/panelcfg`;
  // A gauge and a number have no settings of their own beside a field's.
  const custom = kind === "gauge" || kind === "stat" ? { type: "object", maxProperties: 0 } : allOptional(schemaOf(path, "FieldConfig"));
  return [kind, { options: allOptional(schemaOf(path, "Options")), custom }];
});
const schemas = new Map(kinds);

for (const panel of panels.filter((panel) => panel.type !== "row")) {
  const schema = schemas.get(panel.type);
  if (!schema) {
    console.error(`panel \`${panel.title}\`: no types for the kind ${panel.type}; add it to KINDS`);
    failed++;
    continue;
  }
  check(`panel \`${panel.title}\`: options`, schema.options, panel.options);
  check(`panel \`${panel.title}\`: custom`, schema.custom, panel.fieldConfig.defaults.custom ?? {});
}

console.log(`schema: ${passed} passed, ${failed} failed`);
process.exitCode = failed === 0 ? 0 : 1;
