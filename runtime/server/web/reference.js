// The routes and the fields of their bodies, from /openapi.json.

import { make } from "./text.js";
import { startTheme } from "./theme.js";

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.type === "array") return `list of ${schema.items ? typeOf(schema.items) : "values"}`;
  return schema.type ?? "any";
}

function fields(schema) {
  const table = make("table");
  const head = make("tr");
  head.append(...["Field", "Type", "Default"].map((text) => make("th", "", text)));
  table.append(head);
  for (const [name, field] of Object.entries(schema.properties)) {
    const row = make("tr");
    const cell = make("td");
    cell.append(make("code", "", name));
    const isRequired = schema.required?.includes(name);
    row.append(cell, make("td", "", typeOf(field)), make("td", "", isRequired ? "required" : JSON.stringify(field.default ?? null)));
    table.append(row);
  }
  return table;
}

function route(path, method, { summary, requestBody }, schemas) {
  const card = make("details", "card");
  const title = make("summary");
  title.append(make("b", "method", method.toUpperCase()), make("code", "", path), make("span", "", summary));
  card.append(title);
  const schema = requestBody?.content["application/json"].schema;
  if (schema) card.append(fields(schemas[schema.$ref.split("/").pop()]));
  else card.append(make("p", "", "No body."));
  return card;
}

startTheme();
const response = await fetch("openapi.json");
const { info, paths, components } = await response.json();
document.getElementById("about").textContent = `${info.title}, version ${info.version}. Streams, errors and options: docs/serving.md.`;
document.getElementById("routes").append(
  ...Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, entry]) => route(path, method, entry, components.schemas)),
  ),
);
