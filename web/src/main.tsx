import { render } from "preact";
import { App } from "./parts/App";
import { meet } from "./state";
import "./styles.css";

render(<App />, document.getElementById("app")!);
void meet();
